"""What training needs: batches, losses, scores, canvases of the model's own. It is handed a model and does not know its class."""
