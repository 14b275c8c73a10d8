"""What a trained policy does, measured on recorded episodes and in the simulator.

predictions.py   chunks predicted at recorded moments, beside the recorded actions
"""
