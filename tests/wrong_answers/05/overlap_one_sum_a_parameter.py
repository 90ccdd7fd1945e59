"""Every gradient is sent by itself: no buckets."""

MESSAGE = "one for each, of a flat array"


def backward_with_overlap(comm, loss, buckets):
    works = []
    params = [p for bucket in buckets for p in bucket]
    hooks = [p.register_hook(lambda p: works.append(comm.all_reduce_async_(p.grad))) for p in params]
    loss.backward()
    for remove in hooks:
        remove()
    for work in works:
        work.wait()
