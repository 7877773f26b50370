"""Makes files of invented problems in the published formats of CodeUpdateArena and HumanEval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def update(name: str, problems: int = 3) -> dict[str, Any]:
    """An update (`math.NAME(x, unit)` also takes degrees) and problems that need it."""
    return {
        "update": {
            "description": f"math.{name} takes degrees.",
            "rationale": "",
            "docstring": "unit: 'radians' or 'degrees'.",
            "signature": f"math.{name}(x, unit='radians')",
            "imports": f"import math\nold_{name} = math.{name}",
            "implementation": f"def {name}(x, unit='radians'):\n"
            f"    return old_{name}(x if unit == 'radians' else x * math.pi / 180)\n",
            "update_type": "add-argument",
            "function_path": f"math.{name}",
            "package": "math",
            "update_id": f"[math.{name}]:[add-argument]:[update-0]",
        },
        "prog_syn_examples": [
            {
                "scenario": "A tutor draws waves.",
                "problem": f"The {name} of each of some degrees, times {i}.",
                "solution_signature": f"def wave_{i}(degrees: List[float]) -> List[float]:",
                "unit_tests": f"def test_zero():\n    assert wave_{i}([0]) == [{i} * math.{name}(0)]\n\n"
                f"def test_ninety():\n    found = wave_{i}([90])\n"
                f"    assert math.isclose(found[0], {i} * math.{name}(math.pi / 2), abs_tol=1e-9)\n",
                "prog_syn_imports": f"import math\nold_{name} = math.{name}",
                "ref_solution": "from typing import List\nimport math\n\n"
                f"def wave_{i}(degrees: List[float]) -> List[float]:\n"
                f"    return [{i} * math.{name}(d, unit='degrees') for d in degrees]\n",
                "prog_syn_id": f"[math.{name}]:[add-argument]:[update-0]:[prog_syn-{i}]",
            }
            for i in range(problems)
        ],
    }


def task(number: int) -> dict[str, str]:
    """A task of HumanEval, with a helper in its prompt as some have."""
    name = f"shifted_{number}"
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def helper(x):\n    return x + {number}\n\n\ndef {name}(x: int) -> int:\n    """x, shifted."""\n',
        "entry_point": name,
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == helper(1) == {number + 1}\n"
        "    assert candidate(5) == helper(5)\n",
    }


def write_lines(path: Path, records: list[Any]) -> Path:
    """The records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
