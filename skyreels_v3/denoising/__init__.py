"""The denoising loop, guidance, schedules, step caching."""
