"""--enhance_prompt: prompts rewritten by a vision-language model, locally or behind an endpoint."""
