"""A worker group that shrinks when its cluster loses a node and grows when one joins, in the middle of a round."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from interruptions import checkpoint, in_the_middle
from ray_cluster import Run, assert_same_adapters, copy_without, end_of, records, run, start, wait_until
from ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
pytest_plugins = ["ray_fixtures"]

ROUND = "world_facts/corsa/seed0/round1"
TEACH = [
    *("--model", "random:tiny-llama", "--placement.threads", "1", "--evaluation.new-tokens", "4", "--methods", "corsa"),
    *("--rounds", "1", "--limit", "7", "--training.batch", "3", "--training.epochs", "500"),
    *("--workers", "1", "--placement.cpus", "0.75"),  # of which a node of one CPU holds one
    # Two workers add in another order than one. At this rate the difference of 4e-9 in phi stays below 1e-7 for 1,500
    # steps, in which phi moves by 3e-3. At 2e-4 the facts are learnt after 200 steps, and AdamW then follows rounding:
    # a batch in two parts, in one process, ends 6e-3 away.
    *("--training.learning-rate", "2e-6"),
]
ELASTIC = ["--max-workers", "2", "--placement.resize-interval", "3", "--placement.checkpoint-every", "5"]
PATIENCE = 400  # seconds: Ray looks at the nodes every 20 seconds, and starts a group in about as many


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes({}) as found:
        yield found


def test_a_group_shrinks_and_grows_and_ends_with_the_adapter_of_one_worker(nodes: Nodes, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    undisturbed = Run(fixed, run([*TEACH, "--storage", fixed], nodes.environment, limit=PATIENCE))
    storage = copy_without(undisturbed, tmp_path / "elastic", ROUND)
    began = time.monotonic()
    driver = start([*TEACH, *ELASTIC, "--storage", storage], nodes.environment)

    def at_work(count: int, after: int) -> bool:
        assert driver.poll() is None, driver.communicate()
        found = checkpoint(undisturbed, storage, ROUND)
        return len(nodes.at_work()) == count and found is not None and found.step > after

    wait_until(lambda: at_work(2, after=0), PATIENCE, "a worker on each node")
    position = in_the_middle(undisturbed, storage, ROUND)
    nodes.lose(next(name for name in nodes.at_work() if name != "head"))
    wait_until(lambda: at_work(1, after=position.step), PATIENCE, "training on the node that is left")
    nodes.script("join", "third")
    position = in_the_middle(undisturbed, storage, ROUND)
    wait_until(lambda: at_work(2, after=position.step), PATIENCE, "a second worker on the new node")
    in_the_middle(undisturbed, storage, ROUND)
    end_of(driver, began, limit=PATIENCE)
    assert records(storage)[ROUND].metrics["workers"] == 2
    assert undisturbed.records[ROUND].metrics["workers"] == 1
    assert_same_adapters(fixed, storage, [ROUND], tolerance=1e-6)
