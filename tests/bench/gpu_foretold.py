"""What `plan` and the floor say of a block that `gpu.py` solves."""

import dataclasses
import json
from typing import Any

import torch
from floor import Shape, count, plan_of, shape_of, some_gpus
from gpu_findings import Bench

from astro_dist.config.schema import RunConfig
from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import DEVICES
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.predicted_groups import predicted_input_groups
from astro_dist.planning.units import Plan
from astro_dist.schedule.calls import SolveBlock
from astro_dist.source.calibration_text import chunk_tokens

__all__ = ["foretold", "lone_layer"]


def foretold(bench: Bench, plan: Plan, shape: Shape, config: RunConfig) -> dict[str, Any]:
    """Return what `plan` says of the solve and of the memory, and the least seconds by phase."""
    device = DEVICES["h200"]
    tokens = chunk_tokens(config.calibration)
    cost = CostModel(PlannedRun(plan, config, tokens, torch.bfloat16, bench.device.type))
    gpu = some_gpus("h200", 1, half=True)
    least = {phase: gpu.seconds(need) for phase, need in count(shape, config).items()}
    return {
        "plan_solve_s": round(cost.work(SolveBlock(0, 0)).seconds(device, half=True), 2),
        "plan_gb": round(cost.worker_bytes() / 1e9, 2),
        "floor_s": {phase: float(f"{s:.3g}") for phase, s in least.items() if s > 0},
    }


def lone_layer(bench: Bench, rows: int, columns: int, tokens: int) -> tuple[Plan, Shape, RunConfig]:
    """Return the plan of a block that has one layer, its down projection, and a configuration with so many tokens.

    No weights are needed. What `plan` then says of memory counts the calibration text and the forward of this block.
    """
    folder = bench.work / f"layer-{rows}-{columns}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "hidden_size": rows, "intermediate_size": columns, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 256, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    length = tokens // 16
    config = RunConfig.model_validate({
        "model": {"source": str(folder)},
        "quantization": {"group_size": 128},
        "calibration": {
            "samples": 16, "sequence_length": length, "chunk_samples": 1, "holdout_samples": 1,
            "token_weights": "norm",
        },
        "execution": {"executor": "local", "workers": 1, "device": bench.device.type},
        "output": {"dir": str(folder / "run")},
    })  # fmt: skip
    plan, _ = plan_of(folder, config.quantization)
    block = plan.blocks[0]
    alone = dataclasses.replace(block, linears=tuple(x for x in block.linears if x.name.endswith("down_proj")))
    shape = dataclasses.replace(
        shape_of(folder, config, 2), blocks=[predicted_input_groups(alone.linears, plan.expert_share)]
    )
    return dataclasses.replace(plan, blocks=(alone,)), shape, config
