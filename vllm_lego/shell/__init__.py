"""`vllm-lego merge` and `vllm-lego inspect`: adapters from the shell, without a server or vLLM."""
