# ruff: noqa: INP001, S310, T201  a script, its URL the chart's
"""What `helm test` runs: one request for a set of adapters, answered by a merge of them."""

import json
import os
import re
import sys
import urllib.error
import urllib.request
from email.message import Message
from typing import Any


def call(path: str, body: dict[str, Any] | None = None) -> tuple[Message, Any]:
    """Return the headers and the JSON of an answer."""
    headers = {"content-type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["URL"] + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{path} answered {error.code}: {error.read().decode(errors='replace')}")


served = [adapter["name"] for adapter in call("/v1/adapters")[1]["data"]]
adapters = os.environ["ADAPTERS"].split() or served[:2]
question = {"role": "user", "content": os.environ["QUESTION"]}
body = {"model": os.environ["MODEL"], "messages": [question], "max_tokens": 32}
headers, answer = call("/v1/chat/completions", body | {"adapters": adapters})
print(f"{adapters} of {served}: {answer['choices'][0]['message']['content']!r}")
print(f"model {answer['model']}, cache {headers['x-lego-cache']}")
if len(adapters) < 2:
    print("fewer than two adapters are served: there is nothing to merge")
elif not re.fullmatch("lego-[0-9a-f]{16}", headers["x-lego-model"] or ""):
    sys.exit(f"x-lego-model is {headers['x-lego-model']!r}, not a merge's name")
