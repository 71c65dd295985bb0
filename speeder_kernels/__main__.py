"""`python -m speeder_kernels`: what was built, and which backends are available or why not."""

from __future__ import annotations

import torch

from speeder_kernels.dispatch import backends, interprets_triton, not_built_for, too_old

try:
    from speeder_kernels import _host
except ImportError:
    _host = None


def describe() -> str:
    """The report, a line a fact."""
    lines = [f"torch              {torch.__version__}"]
    if _host is None:
        lines.append("compiled code      not built (pip install --no-build-isolation . builds it)")
    else:
        info = _host.build_info()
        cuda = f"{info['cuda']} for {info['cuda_archs']}" if info["cuda"] else f"no: {info['cuda_missing']}"
        lines += [
            f"built with         {info['compiler']}, torch {info['torch']}",
            f"CUDA kernels       {cuda}",
            f"instruction set    {_host.instruction_set()}",
        ]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        reason, unbuilt = too_old(device), not_built_for(device)
        state = f"not for triton and cuda: {reason}" if reason else "fit for triton and cuda"
        if unbuilt and not reason:
            state = f"fit for triton, not for cuda: {unbuilt}"
        lines.append(f"GPU {index:<14} {torch.cuda.get_device_name(index)}, {state}")
    lines.append("backends")
    for backend in backends().values():
        state = "available: " + ", ".join(backend.ops) if backend.available else "no: " + backend.reason
        if backend.name == "triton" and backend.available and interprets_triton():
            state += " (interpreted: slow, and only where asked for)"
        lines.append(f"  {backend.name:<16} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
