"""From LeRobotDatasets v3 to batches.

sources.py       which datasets: folders, the hub, several with weights
features.py      what a dataset's meta/info.json says of it
rows.py          a dataset's rows without the pictures, checked
table.py         the rows of all datasets
windows.py       which rows make a sample
statistics.py    what a policy normalises with
order.py         which samples make a batch, as a function of its number alone
videos.py        where each row's picture is, and reading it
decoding.py      every picture of a camera once
disk.py          decoded pictures in a file that processes and runs share
frames.py        the pictures: decoded once and kept, in memory or in a file
streaming.py     the pictures: decoded as they are needed
hub.py           a repository of the Hugging Face hub, downloaded
errors.py        what goes wrong, in words
"""
