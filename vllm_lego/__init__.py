"""A vLLM plugin that serves any combination of LoRA adapters, per request, merged with LoRA-LEGO."""
