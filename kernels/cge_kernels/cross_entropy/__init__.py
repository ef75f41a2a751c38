"""revised_cross_entropy, the loss in training: classifier, cosines, weights and softmax over the classes."""
