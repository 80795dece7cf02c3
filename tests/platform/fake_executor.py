"""What stands in for Ray under `piste.training`: an executor whose workers die, and a network between.

Real are the driver's side (`training.train`, `training.fit`), a worker's side (`training._work`), the
writer's class and all that they use. Fake are processes, placement, and the way of a call to the writer:
it may be lost, answered in vain, come twice, or come later than anybody waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from ray.train import WorkerGroupError
from tests.platform.simulated import World, current, fault, pause

from piste.errors import PisteError
from piste.writer import Writer

Call = Callable[[], Any]


class Actor:
    """A handle: `handle.method.remote(...)` is a call that `Executor.ask` carries out."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self.killed = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._instance, name)

        def remote(*arguments: Any) -> tuple[Actor, str, Call]:
            if name == "stop" and not self.killed:  # nobody waits for its answer
                method()
            return self, name, lambda: method(*arguments)

        return SimpleNamespace(remote=remote)


class Executor:
    """Workers, and the calls that are still on their way."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.late: list[Call] = []
        self.draining: set[str] = set()  # nodes that are being taken away

    # -- in place of what piste.training asks of Ray ---------------------------------------------------

    @contextlib.contextmanager
    def cluster(self, *_: Any, **__: Any) -> Iterator[None]:
        yield

    def start_writer(self, *arguments: Any) -> Actor:
        return Actor(Writer(*arguments))

    def ask(self, reference: tuple[Actor, str, Call]) -> Any:
        """Carries out a call to the writer, over a network that does as it likes."""
        actor, name, call = reference
        pause()
        if actor.killed:
            raise PisteError("the ledger's writer does not answer: it has gone")
        what = fault("before", "after", *(("late", "twice") if name == "apply" else ()))
        if what == "before":
            raise PisteError("the ledger's writer does not answer: the call was lost")
        if what == "late":
            self.late.append(call)
            raise PisteError("the ledger's writer does not answer: in time")
        if what == "twice":
            self.late.append(call)
        answer = call()
        if what == "after":
            raise PisteError("the ledger's writer does not answer: its answer was lost")
        return answer

    def kill(self, actor: Actor) -> None:
        actor.killed = True

    @property
    def ray(self) -> Any:
        """In place of the module `ray`: what is not here is not to be asked for."""
        worker = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        train = SimpleNamespace(get_context=lambda: worker, report=lambda _metrics: pause())
        host = SimpleNamespace(get_node_id=self._node)
        state = SimpleNamespace(get_draining_nodes=lambda: sorted(self.draining))
        return SimpleNamespace(
            kill=self.kill,
            train=train,
            get_runtime_context=lambda: host,
            _private=SimpleNamespace(state=SimpleNamespace(state=state)),
        )

    @staticmethod
    def _node() -> str:
        """Each process has a node of its own."""
        task = current()
        assert task is not None
        return f"node-{task.process.pid}"

    def trainer(self, work: Callable[[Any], Any], **options: Any) -> _Trainer:
        return _Trainer(self._world, work, options)


class _Trainer:
    def __init__(self, world: World, work: Callable[[Any], Any], options: Mapping[str, Any]) -> None:
        self._world, self._work = world, work
        self._config = options["train_loop_config"]
        self._failures = options["run_config"].failure_config.max_failures

    def fit(self) -> Any:
        """Runs the worker, and another one after each that has died, as often as the recipe says."""
        task = current()
        assert task is not None
        for _ in range(self._failures + 1):
            worker = self._world.start("worker", self._begin, task.process)
            self._world.wait(lambda worker=worker: worker.dead)  # type: ignore[misc]
            if worker.main.ended and worker.main.error is None:
                return SimpleNamespace(return_value=worker.main.result)
        died = RuntimeError("the worker has gone")
        raise WorkerGroupError("the workers died too often", {0: died})

    def _begin(self) -> Any:
        pause()  # it is started, and has not said a word yet
        return self._work(self._config)
