"""Several tokens a forward pass: drafts of what may come, verified by the model, with the text of plain decoding."""
