"""All ranks weigh the same."""

MESSAGE = "a rank that saw more targets must weigh more"


def average_parameters(comm, model, seen):
    for p in model.parameters():
        p.assign_(comm.all_reduce(p.data) / comm.size)
