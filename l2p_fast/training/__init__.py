"""What `l2p_fast.train` is made of; each file is one concern, and only `train.py` knows them all."""
