"""Which units a UNet has, what each is worth, and a student without some of them."""
