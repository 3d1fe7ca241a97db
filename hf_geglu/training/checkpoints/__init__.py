"""What a run can go on from after it was killed: complete, or not there."""
