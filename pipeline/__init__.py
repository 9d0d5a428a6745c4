"""Cherry: score an instruction-tuning corpus by IFD and keep its best part.

The flow is ``run.py``::

    list inputs -> work units -> [ tokenise -> score -> commit ] -> select -> write -> report
"""

__version__ = "0.1.0"
