"""What a run learns: the data, the model, the objective and the scores, behind one protocol."""
