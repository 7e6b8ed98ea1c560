"""What tests of the looking commands look at: a real run of an agent, with a bit of everything."""

from __future__ import annotations

from lash_store import MonitorSpec, Recovery, SessionTasks, TaskContext, TaskHandle, TaskKind, TaskStore
from tests.acceptance.commands import HOSTILE


async def fill(store: TaskStore) -> None:
    """
    Let a store work, and return while some of it is live.

    In ``desktop:s1``: ``index`` completed, observed by ``desktop:s2``; ``bad`` failed with hostile text; ``listener`` waits, was
    sent two signals and took one; ``research`` waits as a sub-agent in ``desktop:deep``, with a child ``part``, and one task,
    ``fetch``, in that session; the monitor ``tests`` failed; ``bystander`` told its session something hostile.
    ``desktop:s3`` is closed.
    """

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, text: str, fail: bool = False) -> str:
        await task.progress(text, 0.5)
        if fail:
            raise RuntimeError(text)
        return text

    @store.task(recovery=Recovery.RERUN)
    async def listen(task: TaskContext) -> None:
        await task.signal("go")
        await task.save("went")
        await task.progress("went")
        await task.signal("stop")

    @store.task(recovery=Recovery.RERUN)
    async def think(task: TaskContext) -> None:
        await (await task.spawn(work, "a part", id="part")).wait()
        await task.progress("has its part")
        await task.signal("stop")

    @store.task(recovery=Recovery.RERUN)
    async def tell(task: TaskContext, text: str) -> None:
        await task.notify(text, {"said": text})

    one, two = await store.session("s1"), await store.session("s2")
    index = await one.spawn(work, "Invoice größer \\ 7.pdf", id="index", kind=TaskKind.OBSERVER, notify_on_end=True)
    await index.wait()
    await two.observe("desktop:s1", "index")
    await (await one.spawn(work, HOSTILE, True, id="bad")).wait()
    listener = await one.spawn(listen, id="listener")
    await listener.signal("go", {"way": "left", "odd": HOSTILE}, key="first")
    await _until_progress(listener)
    await listener.signal("later", [1, 2])
    deep = await store.session("deep")
    research = await one.spawn(think, id="research", kind=TaskKind.SUBAGENT, child_session_id="deep")
    await _until_progress(research)
    await (await deep.spawn(work, "far below", id="fetch")).wait()
    line = "echo fine; echo dire >&2; sleep 0.01; exit 3"
    await (await one.start_monitor(MonitorSpec(id="tests", command=line, shell=True))).wait()
    await (await one.spawn(tell, HOSTILE, id="bystander")).wait()
    await _read_first_note(one)
    three = await store.session("s3")
    await three.close()


async def _until_progress(handle: TaskHandle) -> None:
    async for event in handle.events():
        if event.type == "progress":
            return


async def _read_first_note(session: SessionTasks) -> None:
    async with session.inbox(limit=1) as notes:
        assert [note.task_id for note in notes] == ["index"]


async def make(path: object) -> None:
    """Make such a file, its owner gone."""
    async with TaskStore(str(path), runtime="desktop") as store:
        await fill(store)
