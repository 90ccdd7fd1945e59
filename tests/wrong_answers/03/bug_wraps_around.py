"""Missing partners are replaced by `% N`: ranks wait for each other in a circle."""

MESSAGE = "must name each other"


def doubling_all_reduce(comm, x):
    total, distance = x.copy(), 1
    while distance < comm.size:
        partner = (comm.rank ^ distance) % comm.size
        if partner != comm.rank:
            sending = comm.isend(total, partner)
            received = comm.recv(partner)
            sending.wait()
            total = total + received
        distance *= 2
    return total
