"""From noise to latents: noise schedules, guidance, and the one denoising loop."""
