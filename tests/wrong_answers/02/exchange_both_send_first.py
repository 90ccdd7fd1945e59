"""Both ranks send before they receive."""

MESSAGE = "`send` returns when the other rank receives, and that one sends as well"


def exchange(comm, x, partner):
    comm.send(x, partner)
    return comm.recv(partner)
