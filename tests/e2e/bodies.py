"""The smallest body of every route that names a `model`, without the `model`."""

from __future__ import annotations

from typing import Any

MESSAGES = [{"role": "user", "content": "Write 4721 in words."}]
QUERY = {"query": "a river", "documents": ["water", "fire"]}

GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 4},
    "/v1/completions": {"prompt": "Write 86 in words.\n", "max_tokens": 4},
    "/v1/responses": {"input": "Write 4721 in words.", "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/generative_scoring": {"query": "Is it?", "items": ["no"], "label_token_ids": [300, 301]},
    "/invocations": {"messages": MESSAGES, "max_tokens": 4},
}
TEXT: dict[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "cities"},
    "/detokenize": {"tokens": [300, 301]},
}
POOLING: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["a river", "a city"]},
    "/v2/embed": {"texts": ["a river"], "embedding_types": ["float"]},
    "/pooling": {"input": "a river"},
    "/score": {"text_1": "a river", "text_2": ["water", "fire"]},
    "/v1/score": {"text_1": "a river", "text_2": ["water", "fire"]},
    "/rerank": QUERY,
    "/v1/rerank": QUERY,
    "/v2/rerank": QUERY,
}
OF_OTHER_MODELS = {
    "/classify",
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
    "/inference/v1/generate",
    "/v1/systemone",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/messages/render",
    "/v1/responses/render",
}
"""Routes with a `model` that need another model or another flag than the tests' servers have."""

WITHOUT_A_MODEL = {
    "/fault_tolerance/apply",
    "/inference/v1/abort_requests",
    "/is_scaling_elastic_ep",
    "/ping",
    "/scale_elastic_ep",
    "/v1/adapters/merge",
    "/v1/responses/{response_id}/cancel",
}
FORMS = {"/v1/audio/transcriptions", "/v1/audio/translations"}
"""They have a `model`, in a form, not in JSON."""

KNOWN = {*GENERATING, *TEXT, *POOLING, *OF_OTHER_MODELS, *WITHOUT_A_MODEL, *FORMS}
