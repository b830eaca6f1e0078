"""The command line: one module per command, with its parser and its function.

``most NAME``, ``python -m megatron_most.commands.NAME`` and the scripts in ``tools/`` and ``examples/`` call the same
function. A module imports torch, Megatron and other slow packages inside that function, so that ``--help`` and a wrong
option are answered at once.
"""
