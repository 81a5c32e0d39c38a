"""One rule's weights from container to container, in bounded memory."""
