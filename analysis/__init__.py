"""How a model fuses images, and what follows from that for the settings of methods.

``probes`` are methods that look or blind, ``recorder`` what they look at; ``windows`` which layers are probed;
``stages`` puts the measurements together and ``boundaries`` finds where stages begin and end. ``calibrate`` finds
settings of methods by measuring them on a ``bench``: those of the grids in ``searches``, of which ``candidates`` says
what each leaves and costs; ``fit`` holds the searches of methods' authors. ``asking`` asks the same questions again
and again.
"""
