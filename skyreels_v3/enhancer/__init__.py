"""--enhance_prompt: prompts rewritten by a vision-language model, here or behind an endpoint."""
