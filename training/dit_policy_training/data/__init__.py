"""From LeRobotDatasets v3 to batches.

sources.py       which datasets: folders, the hub, several with weights
features.py      what a dataset's meta/info.json says of it
table.py         their rows without the pictures, checked
windows.py       which rows make a sample
statistics.py    what a policy normalises with
order.py         which samples make a batch, as a function of its number alone
videos.py        where each row's picture is, and reading it
frames.py        the pictures: decoded once and kept, in memory or in a file
streaming.py     the pictures: decoded as they are needed
errors.py        what goes wrong, in words
"""
