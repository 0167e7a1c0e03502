-- Take the run's lease, or learn who holds it and for how long.
-- KEYS[1] lease (hash: owner, token)   KEYS[2] fence (integer, only grows)
-- ARGV[1] owner, unique to one holder   ARGV[2] lifetime in milliseconds   ARGV[3] random, never used before
-- Returns {1, token} when taken, {0, owner that holds it, milliseconds that it has left} when not.
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then
  return {0, owner, redis.call('PTTL', KEYS[1])}
end
-- A Redis that restarted empty counts from 1 again: the random part keeps a token unique for ever.
local token = redis.call('INCR', KEYS[2]) .. '-' .. ARGV[3]
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {1, token}
