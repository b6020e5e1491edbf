"""Every private torch API that vllmc uses, behind names of our own."""
