"""From LeRobotDatasets v3 to batches.

sources.py       which datasets: folders, the hub, several with weights
table.py         their rows without the pictures, checked
windows.py       which rows make a sample
statistics.py    what a policy normalises with
order.py         which samples make a batch, as a function of the step alone
frames.py        the pictures: decoded once and kept, in memory or in a file
streaming.py     the pictures: decoded as they are needed
"""
