"""What importers and exporters of all forms share: tables read both ways, tensors, comparing."""
