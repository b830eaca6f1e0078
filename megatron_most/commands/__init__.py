"""The command line: a module for each command, which holds its parser and its function.

``most NAME``, ``python -m megatron_most.commands.NAME`` and the scripts in ``tools/`` and ``examples/`` call the same
function. A module imports torch, Megatron and whatever else takes time inside that function, so that ``--help`` and a
wrong option are answered at once.
"""
