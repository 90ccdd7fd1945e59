"""Which kind of parallelism, and how many of each: a cost model, checked against what really runs.

    work         what an operation costs: multiplications, elements moved, elements kept
    shapes       models as rows of such operations, as one rank sees them
    layout       a layout and a precision
    machine      a machine in numbers, as a file;  presets  those of data sheets
    memory       bytes a rank holds
    collectives  seconds of a communication
    step_time    seconds of a step
    traffic      bytes that each axis moves
    fit          a machine's numbers from runs that somebody measured
    plan         all layouts of a model on a machine, ranked and explained
    calibrate    measures this machine
"""
