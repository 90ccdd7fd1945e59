"""The root sends to every rank itself, one after the other."""

MESSAGE = "let the ranks that have the array already hand it on"


def tree_broadcast(comm, x, root=0):
    if comm.rank != root:
        return comm.recv(root)
    for rank in range(comm.size):
        if rank != root:
            comm.send(x, rank)
    return x.copy()
