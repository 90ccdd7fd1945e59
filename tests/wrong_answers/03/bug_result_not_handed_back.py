"""The extra ranks hand in their part and never get the sum."""

MESSAGE = "must get the sum back at the end"


def doubling_all_reduce(comm, x):
    total, distance = x.copy(), 1
    power = 1 << (comm.size.bit_length() - 1)
    if comm.rank >= power:
        comm.send(total, comm.rank - power)
        return total
    if comm.rank + power < comm.size:
        total = total + comm.recv(comm.rank + power)
    while distance < power:
        sending = comm.isend(total, comm.rank ^ distance)
        received = comm.recv(comm.rank ^ distance)
        sending.wait()
        total = total + received
        distance *= 2
    return total
