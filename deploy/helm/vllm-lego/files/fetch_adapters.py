# ruff: noqa: INP001, T201  a script
"""Bring adapters from the hub into a folder: what the init container `adapters` runs.

    ADAPTERS='[{"name": "sql", "repository": "org/sql", "revision": "v1"}]' fetch_adapters.py FOLDER

Configuration and safetensors only, of one commit, compared with the digests that the hub gives.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from lego_core import fetch_adapter

for adapter in json.loads(os.environ["ADAPTERS"]):
    source = fetch_adapter(adapter["repository"], adapter.get("revision"), name=adapter["name"])
    folder = Path(sys.argv[1], adapter["name"])
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    print(f"{folder}: {source.source} at {source.revision}")
