"""`python -m speeder_kernels`: what was built, and which backends are available or why not."""

from __future__ import annotations

import torch

from speeder_kernels import _host
from speeder_kernels.dispatch import HOW_TO_BUILD, backends, interprets_triton, not_built_for, too_old


def describe() -> str:
    """The report, a line a fact."""
    lines = [f"torch              {torch.__version__}"]
    info = _host.build_info()
    if info:
        cpu = f"for {_host.instruction_set()}" if info["compiler"] else f"no: {info['cpu_missing']}"
        cuda = f"{info['cuda']} for {info['cuda_archs']}" if info["cuda"] else f"no: {info['cuda_missing']}"
        lines += [
            f"built with         {info['compiler'] or 'no C++ compiler'}, torch {info['torch']}",
            f"CPU kernels        {cpu}",
            f"CUDA kernels       {cuda}",
        ]
    else:
        lines.append(f"compiled code      not built ({HOW_TO_BUILD})")
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
