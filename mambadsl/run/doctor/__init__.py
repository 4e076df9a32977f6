"""Looks at this machine: what is installed, whether it loads, and whether parts compute what they should.

child.py runs a question in a process of its own (an extension module may crash, hang, or spoil CUDA), `answer.py` is
what runs there, kernels.py its comparison of a part with the reference, untuned.py what makes that quick.
environment.py and packages.py ask; report.py puts it together, text.py writes it.
"""
