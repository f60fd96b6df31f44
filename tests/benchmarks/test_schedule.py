"""The static model of time: what it reads in machine code, and its arithmetic. Real kernels are compiled in a
process in which the interpreter is off."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from single_kernels.journal import Journal
from single_kernels.names import add_layer_norm_name, measured_times
from single_kernels.schedule import ENDS, MULTIPROCESSORS, Launched, Schedule, Work, estimate, parsed

ROOT = Path(__file__).resolve().parents[2]
# Two instructions, a loop of six with two products and one special function, an epilogue of three.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        /*0040*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   MUFU.EX2 R7, R7 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/               @P1 MUFU.RCP R9, R9 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""
REAL = """
import json
from single_kernels.goals import LARGE, PLACE, choices
from single_kernels.cases import cases
from single_kernels.goals import problem_of, schedule_of
from single_kernels.names import described
from pruned_ops.ops.backends.triton import ahead_of_time, configs
config = configs.LINEAR_GELU[2][0]
gemm = schedule_of(ahead_of_time.gemm_case(config, "fp16"))
attention = schedule_of(ahead_of_time.attention_case(configs.ATTENTION[2][64][0], 64, "fp16"))
rows = {}
for case in cases(LARGE[0], (384,) * 32, PLACE):
    if case.op == "add_layer_norm":
        rows = {described(choice.config): choice.seconds for choice in choices(case)}
        assert problem_of(case) == "add_layer_norm 12288x1024"
print(json.dumps([gemm.step.flops, 2.0 * config.block_m * config.block_n * config.block_k, gemm.waits,
    gemm.programs, gemm.tile.instructions, attention.step.flops, attention.waits, attention.step.special,
    rows]))
"""


def test_a_loop_and_the_rest_are_read_apart() -> None:
    schedule = parsed(CODE, 8, 2, False)
    assert schedule.step.instructions == 6 and schedule.step.special == 1
    assert schedule.step.flops == 2 * (2.0 * 64 * 128 * 16) * 2  # two groups of four warps
    assert schedule.tile.instructions == 6 and schedule.tile.special == 1
    assert not schedule.waits  # it waits for the product before
    assert parsed(CODE.replace("gsb0, 0x1", "gsb0, 0x0"), 8, 2, False).waits


def test_what_a_persistent_loop_does_once_a_tile_is_no_step() -> None:
    once = "".join(f"        /*1{i:03x}*/                   FADD R1, R1, R2 ;\n" for i in range(80))
    skip = "        /*0051*/               @P3 BRA `(.L_x_5) ;\n" + once + ".L_x_5:\n"
    code = CODE.replace("        /*0060*/", skip + "        /*0060*/")
    schedule = parsed(code, 8, 1, True)
    assert schedule.step.instructions == 7 and schedule.tile.instructions == 80


def test_units_waves_and_limits() -> None:
    step = Work(instructions=100, flops=4096 * 1000)  # 1,000 cycles of products, 200 of instructions
    for waits, cycles in ((False, 1000), (True, 1200)):
        schedule = Schedule(step, Work(), waits, programs=1, warps=8)
        one = estimate(schedule, Launched(MULTIPROCESSORS, 10, 0))
        assert one.cycles == 10 * cycles + ENDS and one.waves == 1
    two = Schedule(step, Work(), True, programs=2, warps=8)
    full = estimate(two, Launched(2 * MULTIPROCESSORS, 10, 0))
    assert (
        full.cycles == 20 * 1000 and full.limit == "products"
    )  # the one multiplies while the other does not
    assert estimate(two, Launched(10, 10, 0)).limit == "few tiles"
    ragged = estimate(two, Launched(2 * MULTIPROCESSORS + 1, 10, 0))
    assert ragged.limit == "the last wave" and ragged.cycles == 20 * 1000 + 12000 + ENDS
    special = Schedule(Work(), Work(special=1000), False, programs=1, warps=4)
    assert estimate(special, Launched(MULTIPROCESSORS, 0, 0)).cycles == 1000 * 4 * 2 + ENDS


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_real_kernels_have_their_products_and_limits() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    flops, expected, waits, programs, tile, attention, attention_waits, special, rows = json.loads(
        done.stdout
    )
    assert flops == expected and not waits and programs >= 1 and tile > 500
    assert attention == 2 * 2.0 * 64 * 64 * 64 and attention_waits  # scores and context of a block of keys
    assert special >= 64 * 64 / 128  # an exponential for each score, over 128 threads
    assert rows and all(1e-6 < seconds < 1e-4 for seconds in rows.values())


def test_measured_times_are_found_by_their_names(tmp_path: Path) -> None:
    problem = add_layer_norm_name(12288, 1024)
    with Journal(tmp_path / "kernels.jsonl") as journal:
        journal.note("timed", problem=problem, name="triton rows 1 warps 1", us=20.0)
        journal.note("timed", problem=problem, name="cuda", us=19.0)
        journal.note("left out", problem=problem, name="triton y", reason="no time")
    assert measured_times(tmp_path / "kernels.jsonl") == {(problem, "rows 1 warps 1"): 20.0}
