"""Two processes of one group, forks of the test's own, which has imported everything."""

import multiprocessing
import traceback

import torch
import torch.distributed as dist


def _run(check, rank, folder, arguments):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
        check(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise


def both_ranks(check, folder, *arguments):
    """Runs check(rank, *arguments) as rank 0 and 1 of dist.group.WORLD; fails with what either says."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_run, args=(check, rank, folder, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    said = [path.read_text() for path in sorted(folder.glob("error*"))]
    for process in ranks:
        process.kill()
    assert not said, said[0]
    assert [process.exitcode for process in ranks] == [0, 0]
