"""Training on machines of Modal.

launch.py      what is asked for, and whether it can be: GPU, time, paths on the volume
job.py         what runs there: an attempt at a run, which goes on where the last one stopped
modal_app.py   Modal's objects: image, volume, function. The only file that imports modal
"""
