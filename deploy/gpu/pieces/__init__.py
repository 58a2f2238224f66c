"""What is measured, a module a piece with a function run(results), in order of worth.

kernels    the Triton kernel against the formula at real sizes and odd ones; selection on the device against the CPU's
selection  time and memory of selection at the paper's size, against its matrix products
losses     sigmoid and softmax loss, forward and backward, against open_clip's
steps      uniform, JEST and FlexiJEST steps: time beside FLOPs, memory, recompilations, and what `jest plan` predicts
scoring    images a second that a reference embeds, against the bare forward
decoding   JPEGs a second, decoded by the card and by the CPU
chain      the demonstration by the `jest` commands: a killed run against one that was not
learning   joint, independent and uniform selection on the demonstration's data at b = 2,048

commands   how the last two run `jest`
"""
