"""The verbs: flows that hand records from one room of ``medtl`` to the next.

``steps`` composes (plain functions), ``tasks`` gives each step a name in Prefect, the flows only put them in order,
``cli`` is the door. Reuse is decided by :mod:`medtl.artifacts`, never by Prefect.
"""
