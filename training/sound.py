"""Synthetic voices, the mouth opening for a sound, and an audio encoder whose features contain it."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

from skyreels_v3.wan.conditioning import AudioEncoder
from training.layouts import AUDIO_ENCODER, random_model

RATE = 16_000
FPS = 25
QUIET, LOUD = 0.25, 1.9  # loudness at which a mouth is shut and fully open; 1 is the whole sound's


def make_voice(seed: int, seconds: float) -> np.ndarray:
    """Syllables of varying pitch and timbre, in phrases with pauses, float32 [samples]."""
    random = np.random.default_rng([5, seed])
    samples = np.zeros(int(seconds * RATE), np.float32)
    pitch = random.uniform(95, 240)
    place = random.uniform(0.0, 0.5)
    while place < seconds:
        end = place + random.uniform(0.6, 2.6)
        while place < min(end, seconds - 0.1):
            length = random.uniform(0.1, 0.26)
            syllable = make_syllable(random, length, pitch * random.uniform(0.85, 1.2))
            first = int(place * RATE)
            part = samples[first : first + len(syllable)]
            part += syllable[: len(part)]
            place += length * random.uniform(0.85, 1.5)
        place = max(place, end) + random.uniform(0.2, 0.9)
    samples += random.normal(0, 10 ** random.uniform(-4.0, -2.7), len(samples)).astype(np.float32)
    return samples


def make_dialog(seed: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Two voices that take turns, float32 [samples], each silent in the other's."""
    random = np.random.default_rng([9, seed])
    first, second = (make_voice(2 * seed + person, seconds) for person in range(2))
    ends = np.cumsum(random.uniform(0.7, 3.0, math.ceil(seconds / 0.7)))
    turn = np.searchsorted(ends, np.arange(len(first)) / RATE) + random.integers(2)
    return first * (turn % 2 == 0), second * (turn % 2 == 1)


def make_syllable(random: np.random.Generator, length: float, pitch: float) -> np.ndarray:
    """A vowel, with a hiss before it in 40 % of cases."""
    times = np.arange(int(length * RATE)) / RATE
    shape = np.sin(math.pi * np.clip(times / length, 0, 1)) ** random.uniform(0.5, 1.2)
    formants = random.uniform((300, 900, 2200), (850, 2200, 3200))
    tones = np.arange(1, 24) * pitch
    heights = sum(np.exp(-(((tones - formant) / 220) ** 2)) for formant in formants) + 0.05
    phases = 2 * math.pi * tones[:, None] * times + random.uniform(0, 6, len(tones))[:, None]
    vowel = (heights[:, None] * np.sin(phases)).sum(0)
    vowel *= shape * random.uniform(0.35, 1.0) / max(1e-6, np.abs(vowel).max())
    if random.random() < 0.4:
        hiss = random.normal(0, 0.05, int(0.05 * RATE))
        vowel = np.concatenate((hiss * np.hanning(len(hiss)), vowel))
    return vowel.astype(np.float32)


def loudness(samples: np.ndarray) -> np.ndarray:
    """Loudness of each video frame: RMS of the 60 ms around it, relative to that of the whole sound."""
    frames = math.ceil(len(samples) / RATE * FPS)
    samples = samples.astype(np.float64) - samples.mean()
    power = np.cumsum(np.concatenate(([0.0], samples**2)))
    centers = np.arange(frames) / max(1, frames - 1) * len(samples)  # as the encoder stretches its features
    first = np.clip(centers - 0.03 * RATE, 0, len(samples)).astype(int)
    last = np.clip(centers + 0.03 * RATE, 1, len(samples)).astype(int)
    local = (power[last] - power[first]) / np.maximum(1, last - first)
    return np.sqrt(local / max(1e-12, power[-1] / len(samples)))


def mouth_of(samples: np.ndarray) -> np.ndarray:
    """How far the mouth is open in each video frame, 0 to 1."""
    opened = ((loudness(samples) - QUIET) / (LOUD - QUIET)).clip(0, 1) ** 0.7
    around = np.pad(opened, 1, mode="edge")
    return 0.25 * around[:-2] + 0.5 * around[1:-1] + 0.25 * around[2:]


def audio_module() -> Wav2Vec2Model:
    """A small wav2vec2 whose features contain the loudness.

    The first convolution filters ten bands and half-rectifies them; the others average. Three channels are kept above
    and three below the others, so that the norms that follow do not remove the loudness.
    """
    model = random_model(lambda: Wav2Vec2Model(Wav2Vec2Config(**AUDIO_ENCODER)))
    random = np.random.default_rng(17)
    layers = model.feature_extractor.conv_layers
    channels = layers[0].conv.weight.shape[0]
    bands = channels - 6
    with torch.no_grad():
        first = layers[0]
        filters = random.standard_normal(first.conv.weight.shape)
        first.conv.weight.copy_(torch.from_numpy(filters - filters.mean(axis=2, keepdims=True)))
        first.layer_norm.weight.copy_(torch.tensor([1.0] * bands + [0.0] * 6))
        first.layer_norm.bias.copy_(torch.tensor([0.0] * bands + [4.0] * 6))
        for number, layer in enumerate(layers[1:]):
            weight = torch.zeros_like(layer.conv.weight)
            taps = weight.shape[2]
            for channel in range(channels):
                weight[channel, channel] = 1 / taps
            if number == 0:  # maps the constant 4 to 5 (plus loudness), 6.5 and 3.5
                for channel in range(bands):
                    weight[channel, channel] = 2.5 / taps
                    weight[channel, bands] = 5 / 4 / taps
                for channel in range(bands, channels):
                    weight[channel, channel] = (6.5 if channel < bands + 3 else 3.5) / 4 / taps
            layer.conv.weight.copy_(weight)
        projection = model.feature_projection.projection
        projection.weight.copy_(torch.from_numpy(random.standard_normal(projection.weight.shape) / 4))
        model.encoder.pos_conv_embed.conv.parametrizations.weight.original0.zero_()  # only loudness matters
    return model.eval().requires_grad_(False)


def audio_encoder() -> AudioEncoder:
    """The audio encoder in the pipeline's wrapper."""
    return AudioEncoder(audio_module())
