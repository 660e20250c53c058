"""Prediction: requests in, answers out."""
