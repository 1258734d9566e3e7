"""From wav2vec2 features to the audio tokens of every latent frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyreels_v3.wan.transformer.norms import layer_norm

GROUP = 4  # video frames of a latent frame, the first one excepted


class AudioProjection(nn.Module):
    """Windows of audio features to `tokens` audio tokens of width `audio_dim` for each latent frame.

    The first latent frame is one video frame and sees that frame's window. A later one is four video frames and sees,
    of their windows, what reaches back from the first, the middles of the two between, and what reaches ahead from the
    last.
    """

    def __init__(self, window: int, features: int, hidden: int, tokens: int, audio_dim: int) -> None:
        super().__init__()
        self.middle = window // 2
        entries = 2 * (self.middle + 1) + GROUP - 2
        self.tokens = tokens
        self.first_frame = nn.Linear(window * features, hidden)
        self.later_frames = nn.Linear(entries * features, hidden)
        self.shared = nn.Linear(hidden, hidden)
        self.to_tokens = nn.Linear(hidden, tokens * audio_dim)
        self.norm = nn.LayerNorm(audio_dim)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, F, window, layers, channels) of 4k+1 video frames -> (B, k+1, tokens, audio_dim)."""
        audio = audio.flatten(3)  # (B, F, window, features)
        groups = audio[:, 1:].unflatten(1, (-1, GROUP))  # (B, k, 4, window, features)
        middle = self.middle
        seen = torch.cat(
            (groups[:, :, 0, : middle + 1], groups[:, :, 1:-1, middle], groups[:, :, -1, middle:]), dim=2
        )  # (B, k, entries, features)
        first = F.relu(self.first_frame(audio[:, :1].flatten(2)))
        later = F.relu(self.later_frames(seen.flatten(2)))
        hidden = F.relu(self.shared(torch.cat((first, later), dim=1)))
        tokens = self.to_tokens(hidden).unflatten(-1, (self.tokens, -1))
        return layer_norm(tokens, self.norm).type_as(audio)
