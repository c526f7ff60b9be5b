"""The pipeline from backbone features to detections: neck, encoder, queries, decoder, heads."""
