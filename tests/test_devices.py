"""Whole runs on a simulated accelerator, on any machine: its tensors are CPU tensors that report another device.

Mixing them with CPU tensors in an operation is an error, as it is on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from skyreels_v3 import components, runtime
from skyreels_v3 import generate as session
from skyreels_v3.memory.policy import Policy
from tests.conftest import ASSETS

GPU = torch.device("meta")  # a device that every build of torch has
BETWEEN = {"_to_copy", "to", "copy_", "index", "index_put_", "_index_put_impl_", "_local_scalar_dense"}


class GpuTensor(Tensor):
    """A CPU tensor that reports the GPU as its device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        options = {"dtype": held.dtype, "layout": held.layout, "device": GPU, "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), **options)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """Wraps tensors that are created on the GPU or moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


class Numbers(TorchFunctionMode):
    """Copies Python numbers to the device via the CPU, as for a GPU; on meta torch would drop their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the wrapped tensors; the result is on the device where torch would put it."""
    name, tensors = func.overloadpacket.__name__, []
    if name == "_has_compatible_shallow_copy_type":
        return False
    tree_map(lambda each: tensors.append(each) if isinstance(each, Tensor) else None, (args, kwargs))
    there = [each for each in tensors if isinstance(each, GpuTensor)]
    mixed = there and any(not isinstance(each, GpuTensor) and each.dim() for each in tensors)
    assert not mixed or name in BETWEEN, f"{func} of tensors on {GPU} and on the CPU"
    devices = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.device)]
    on_gpu = devices[0].type == GPU.type if devices else bool(there)
    if name == "copy_":
        on_gpu = isinstance(args[0], GpuTensor)
    owners = {id(each.held): each for each in there}
    plain = tree_map(of_cpu, (args, kwargs))
    made = func(*plain[0], **plain[1])

    def wrapped(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        if id(each) in owners:  # changed in place
            return owners[id(each)]
        return GpuTensor(each) if on_gpu else each

    return tree_map(wrapped, made)


def of_cpu(argument: Any) -> Any:
    """The CPU tensor inside a wrapped argument."""
    if isinstance(argument, GpuTensor):
        return argument.held
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """scaled_dot_product_attention in elementary operations, (B, N, L, D)."""
    if key.shape[1] != query.shape[1]:  # grouped-query attention
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * (_.get("scale") or query.shape[-1] ** -0.5)
    if _.get("is_causal"):
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def with_gpu(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*given: Any, **more: Any) -> Any:
        with Gpu(), Numbers(), torch.no_grad():
            return call(*given, **more)

    return called


CASES = {
    "reference_to_video": ("--ref_imgs", ASSETS / "fox.png", "--num_frames", 9),
    "single_shot_extension": ("--input_video", ASSETS / "boat.mp4"),
    "talking_avatar": ("--input_image", ASSETS / "portrait.png", "--input_audio", ASSETS / "speech.mp3"),
    "i2v": ("--image", ASSETS / "fox.png", "--num_frames", 9, "--guidance_scale", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "quant"),
    [
        ("reference_to_video", None),
        ("reference_to_video", "fp8_dynamic"),
        ("single_shot_extension", "fp8"),
        ("talking_avatar", None),
        ("i2v", "fp8"),
    ],
)
def test_nothing_is_on_two_devices(main, monkeypatch, tmp_path, task, quant):
    argv = ["--task_type", task, "--model_id", "tiny", "--prompt", "A boat", "--height", 32, "--width", 48]
    argv += [*CASES[task], "--num_inference_steps", 2, "--no_cache", "--verbose", "--save_latents", "a.safetensors"]
    argv += ["--quant", quant] if quant else []
    start = runtime.start

    def on(device: torch.device) -> Callable[..., runtime.Runtime]:
        policy = Policy("offload" if quant == "fp8" else "resident", "for a test", tiles=(1, 2))
        return lambda plan: replace(start(replace(plan, policy=policy)), device=device)

    # the same arithmetic in both runs: near a midpoint, FP8 turns a difference of 1e-7 into one of 1e-3
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    monkeypatch.setattr(runtime, "start", on(torch.device("cpu")))
    code, _, stderr = main(*argv, "--output", "cpu.mp4")
    assert code == 0, stderr
    expected = load_file(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()

    monkeypatch.setattr(runtime, "start", on(GPU))
    monkeypatch.setattr(runtime.Runtime, "make_device_current", lambda self: Gpu().__enter__())
    # inference mode does not work with tensor subclasses that dispatch
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda self: None)
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *_: None)
    # replace a module's parameters instead of their data, which would keep the old device
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    for owner, name in ((components, "quantize"), (session.Generator, "write")):  # not the loader, which uses meta
        monkeypatch.setattr(owner, name, with_gpu(getattr(owner, name)))
    code, _, stderr = main(*argv, "--output", "gpu.mp4")
    assert code == 0, stderr
    made = load_file(tmp_path / "a.safetensors")
    for name, latents in expected.items():
        assert abs(made[name] - latents).max() < 1e-3
