"""Prompts: from what the user writes to what the model gets. Their words are in configs/prompts.yaml and the presets.

model_prompt    the text that the model gets: transition, and the words that prompts began with in training
enhance         --enhance_prompt: a prompt rewritten by a vision-language model
local, remote   that model, on this machine or behind an OpenAI-compatible endpoint
"""
