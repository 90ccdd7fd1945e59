"""Which kind of parallelism, and how many of each: a cost model, checked against what really runs.

In the order of imports:

    layout          a layout and a precision
    work            what an operation costs: multiplications, elements moved, elements kept
    shapes          models as rows of such operations, as one rank sees them
    machine_checks  what a machine's file lacks
    machine         a machine in numbers, as a file
    presets         machines of data sheets
    memory          bytes a rank holds
    collectives     seconds of a communication
    op_time         seconds of an operation, and of blocks of them
    gradient_time   seconds of summing gradients and of the update
    step_time       seconds of a step
    traffic         bytes that each axis moves
    plan            all layouts of a model on a machine, ranked
    explain         what a plan means, in words
    fit             a machine's numbers from runs that somebody measured
    reference       a step of each model by which a machine's pace of the hour is told
    measure_ops     seconds of single operations here
    calibrate       measures this machine
    fullest         bytes that a rank of a running job holds
    run_layouts     what layouts take that really run
"""
